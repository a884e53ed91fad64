"""Hold skill packages: manifests (rskill.yaml, public openral schema 0.1), records of evaluations, robots, licences.

A package is a folder with rskill.yaml, eval/*.json and whatever its weights are. This room reads, checks, compares and
installs packages; it loads no weights and runs no policy. What a packaged policy of ours says of itself is made in
delivery, how it is served in serving: both read from here.
"""
