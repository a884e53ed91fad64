"""What a benchmark writes: a table the gate reads, a report with intervals and labels, a page that is whole."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from prts_core.cli.benchmark import earlier_run, early_stop, read_rates, shown
from prts_core.delivery.comparison import compare_runs
from prts_core.delivery.gate import policy_episodes
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import write_json
from prts_core.rollout import results
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.rollout.local_policy import LocalPolicy
from prts_core.rollout.page import write_page
from prts_core.rollout.results import choose_videos, summarize, timing, video_name, write_episodes
from prts_core.rollout.run_suite import score
from prts_core.sim.pool import WorkerLost
from prts_core.statistics.binomial import Interval, mcnemar_exact, wilson
from prts_core.statistics.sprt import PairedTest, Stop
from prts_core.store.listing import digest_tree
from tests.rollout.toy_slots import CHUNK, SUITE, DotPolicy

POLICY = LocalPolicy(DotPolicy(), {"policy_digest": "sha256:toy"})
SPOILED = replace(SUITE, standins="stand-in assets <22 files>")


def rows_of(plan: EpisodePlan, lost: set[int]) -> list[dict]:
    return [
        {
            "suite": key.suite,
            "task": key.task,
            "instruction": f"go {key.task} & <back>",
            "seed": key.seed,
            "initial_state": key.initial_state,
            "success": index not in lost,
            "steps": 10 + index % 5,
            "looks": 3,
            "latency_ms": 5.0,
            "value_rows": [0, 4, 8],
            "values": [-3.0, -2.0, -1.0 - (index in lost)],
            "perturbation": "{}",
        }
        for index, key in enumerate(plan.keys)
    ]


def written(
    folder: Path, lost: set[int], *, episodes: int = 60, suite=SPOILED, stop: Stop | None = None, **more
) -> dict:
    plan = make_plan(suite, CHUNK, SuiteSettings(episodes=episodes, **more))
    rows = rows_of(plan, lost)
    report = summarize(plan, rows, POLICY, stop=stop)
    report |= {"videos": [], "adapter": [], "replay_faults": [], "neighbours": ""}
    folder.mkdir(parents=True, exist_ok=True)
    write_episodes(folder / "episodes.parquet", plan, rows)
    write_json(folder / "report.json", report)
    write_page(folder / "page.html", report, rows)
    return report


def test_the_report_counts_tasks_and_bounds_rates(tmp_path):
    report = written(tmp_path, {0, 3, 7})
    assert report["successes"] == 57 and report["n"] == 60
    assert report["tasks"]["left"]["successes"] == 18 and report["tasks"]["right"]["successes"] == 19
    bounds = wilson(57, 60)
    assert report["wilson95"] == [round(bounds.lower, 4), round(bounds.upper, 4)]
    assert report["labels"] == ["stand-in assets <22 files>"]
    assert report["protocol_digest"] != written(tmp_path, set(), seed=8)["protocol_digest"]


def test_a_policy_that_nobody_can_identify_is_labelled(tmp_path):
    plan = make_plan(SUITE, CHUNK, SuiteSettings(episodes=6))
    policy = LocalPolicy(DotPolicy(), {"server": "ws://gpu:8000", "unverified": "by the user's word"})
    report = summarize(plan, rows_of(plan, set()), policy, stop=None)
    assert report["labels"] == ["by the user's word"]
    write_page(tmp_path / "page.html", report | {"videos": []}, rows_of(plan, set()))
    page = Checked((tmp_path / "page.html").read_text()).text
    assert "policy: server ws://gpu:8000" in page and page.count("by the user's word") == 1


def test_the_gate_reads_the_table_and_no_episode_is_confused_with_another(tmp_path):
    written(tmp_path, {1})
    frame = pl.read_parquet(tmp_path / "episodes.parquet")
    assert frame["standins"].unique().to_list() == ["stand-in assets <22 files>"]
    assert frame["values"].dtype == pl.List(pl.Float64) and frame["task"][:3].to_list() == ["left", "right", "up"]
    assert policy_episodes(tmp_path / "episodes.parquet").height == 60


class Checked(HTMLParser):
    """Every tag that must be closed is, and nothing is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert not any(str(value).startswith(("http:", "https:", "//")) for _, value in attrs)
        if tag in ("div", "figure", "svg", "details", "table", "h2", "section", "html", "body", "video"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag in ("div", "figure", "svg", "details", "table", "h2", "section", "html", "body", "video"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_says_what_the_numbers_are_worth(tmp_path):
    (tmp_path / "videos").mkdir()
    plan = make_plan(SPOILED, CHUNK, SuiteSettings(episodes=60))
    rows = rows_of(plan, {4})
    name = video_name(4, rows[4])
    (tmp_path / "videos" / name).write_bytes(b"moving pictures")
    report = summarize(plan, rows, POLICY, stop=Stop("high", 60))
    report |= {"videos": [f"videos/{name}"], "adapter": ["gripper turned"], "replay_faults": [], "neighbours": "a bit"}
    write_page(tmp_path / "page.html", report, rows)
    page = Checked((tmp_path / "page.html").read_text())
    assert page.open == []
    for said in (
        "stand-in assets <22 files>",
        "98.3%",
        "59 / 60",
        "Stopped early",
        "gripper turned",
        "a bit",
        "go right & <back>",
        "1 of 60 episodes failed",
    ):
        assert said in page.text, said
    assert len(re.findall("<polyline", (tmp_path / "page.html").read_text())) == 60


def test_times_are_told_beside_the_result_and_never_in_it(tmp_path):
    """The chain's outputs are compared by their bytes: a page is without times unless they are handed to it."""
    plan = make_plan(SUITE, CHUNK, SuiteSettings(episodes=6))
    slow = [row | {"latency_ms": 50.0} for row in rows_of(plan, set())]
    folders = [tmp_path / "fast", tmp_path / "slow"]
    for folder, rows in zip(folders, (rows_of(plan, set()), slow), strict=True):
        folder.mkdir()
        report = summarize(plan, rows, POLICY, stop=None) | {"videos": []}
        write_json(folder / "report.json", report)
        write_episodes(folder / "episodes.parquet", plan, rows)
        write_page(folder / "page.html", report, rows)
    assert digest_tree(folders[0]) == digest_tree(folders[1])
    took = timing(slow, [{"kind": "worker lost"}])
    assert took == {"latency_ms": {"median": 50.0, "p95": 50.0}, "workers_lost": 1}
    write_page(tmp_path / "page.html", report, slow, took)
    page = Checked((tmp_path / "page.html").read_text()).text
    assert "50 ms a look (median)" in page and "Workers lost: 1" in page and "latency, ms" in page


def test_a_perturbed_suite_is_told_axis_by_axis(tmp_path):
    kinds = {
        "plain": {},
        "dark": {"light": {"level": 2}},
        "fog": {"noise": {"level": 1}},
        "murk": {"noise": {"level": 4}},
    }
    tasks = tuple(replace(SUITE.tasks[0], name=name, perturbation=changed) for name, changed in kinds.items())
    plan = make_plan(replace(SUITE, tasks=tasks), CHUNK, SuiteSettings(episodes=12))
    rows = rows_of(plan, {1, 5, 3})
    for row in rows:
        row["perturbation"] = json.dumps({"base": "left", **kinds[row["task"]]})
    report = summarize(plan, rows, POLICY, stop=None)
    assert {name: (axis["successes"], axis["n"]) for name, axis in report["axes"].items()} == {
        "none": (3, 3),
        "light": (1, 3),
        "noise": (5, 6),
    }
    assert report["axes"]["light"]["wilson95"] == report["tasks"]["dark"]["wilson95"]
    levels = {level: one["successes"] for level, one in report["axes"]["noise"]["levels"].items()}
    assert levels == {"1": 3, "4": 2} and report["axes"]["none"]["levels"] == {}
    table = shown({**report, "stopped_early": None})
    assert table.columns[0].header == "axis" and table.row_count == 3
    report |= {"videos": [], "adapter": [], "replay_faults": [], "neighbours": ""}
    write_page(tmp_path / "page.html", report, rows)
    page = Checked((tmp_path / "page.html").read_text())
    assert page.open == [] and "Axes of perturbation" in page.text and "1: 3 / 3, 4: 2 / 3" in page.text
    assert written(tmp_path / "plain", set())["axes"] == {}


def test_failures_are_filmed_first_tasks_in_turn():
    plan = make_plan(SUITE, CHUNK, SuiteSettings(episodes=9))
    rows = rows_of(plan, {2, 4, 6})
    assert choose_videos(plan, rows, 5) == [2, 4, 6, 0, 1] and choose_videos(plan, rows, 2) == [2, 4]
    assert video_name(4, rows[4]) == "failure_00004_right.mp4"


def test_a_worker_lost_while_filming_costs_time_and_no_video(tmp_path, monkeypatch):
    plan = make_plan(SUITE, CHUNK, SuiteSettings(episodes=3))
    rows, asked = rows_of(plan, set()), []

    def film(pool, plan, index, row, actions, folder) -> bool:
        asked.append(index)
        if index == 2 or len(asked) == 1:
            raise WorkerLost("The worker ended")
        return True

    monkeypatch.setattr(results, "render_video", film)
    (tmp_path / "actions").mkdir()
    for index in range(3):
        np.save(tmp_path / f"actions/{index:05d}.npy", np.zeros((1, 2)))
    (fault,) = results.write_videos(None, plan, rows, [0, 1, 2], tmp_path)
    assert asked == [0, 0, 1, 2, 2, 2] and fault.startswith("up 0: not filmed (The worker ended")


def test_a_drop_is_told_and_several_suites_are_corrected(tmp_path):
    suites = {name: replace(SUITE, name=name) for name in ("dots", "spots")}
    for name, suite in suites.items():
        written(tmp_path / "a" / name, {0}, suite=suite)
    written(tmp_path / "b/dots", set(range(1, 20)), suite=suites["dots"])
    written(tmp_path / "b/spots", {5}, suite=suites["spots"])
    made = compare_runs(
        {name: tmp_path / "a" / name for name in suites}, {name: tmp_path / "b" / name for name in suites}, margin=-0.05
    )
    dots, spots = made["suites"]["dots"], made["suites"]["spots"]
    assert dots["p_value"] == mcnemar_exact(1, 19) and dots["p_holm"] == 2 * dots["p_value"] and dots["alarm"]
    assert spots["p_holm"] == 1.0 and made["worse"] == ["dots"] and not made["promote"]
    same = compare_runs({"spots": tmp_path / "a/spots"}, {"spots": tmp_path / "a/spots"}, margin=-0.1)
    assert same["worse"] == [] and same["promote"]


def test_runs_under_other_protocols_are_not_compared(tmp_path):
    written(tmp_path / "a", set(), seed=8)
    written(tmp_path / "b", set())
    with pytest.raises(DataError, match=r"different protocols.*seed: 8 then, 7 now"):
        compare_runs({"dots": tmp_path / "a"}, {"dots": tmp_path / "b"}, margin=0)


def test_a_run_that_stopped_early_is_compared_where_both_ran(tmp_path):
    written(tmp_path / "a", set())
    written(tmp_path / "b", {2}, episodes=30)
    one = compare_runs({"dots": tmp_path / "a"}, {"dots": tmp_path / "b"}, margin=0)["suites"]["dots"]
    assert one["n_pairs"] == 30 and one["unpaired"] == [0, 30] and one["only_champion"] == 1
    assert one["labels"] == ["stand-in assets <22 files>"]


def test_a_stop_is_told_with_bounds_that_hold_then(tmp_path):
    lost = set(range(0, 40, 3))
    stop = Stop("worse", 40, Interval(0.65, 0.4, 0.85), "valid whenever one stops", p_value=0.04)
    written(tmp_path / "a", set())
    report = written(tmp_path / "b", lost, episodes=40, stop=stop)
    assert report["stopped_early"]["interval"] == {"estimate": 0.65, "lower": 0.4, "upper": 0.85}
    page = Checked((tmp_path / "b/page.html").read_text()).text
    assert "[40.0%, 85.0%] 95 %, valid whenever one stops" in page and "Wilson 95 %" in page
    made = compare_runs({"dots": tmp_path / "a"}, {"dots": tmp_path / "b"}, margin=-0.05)
    one = made["suites"]["dots"]
    assert one["stopped"] and one["p_value"] == 0.04 and made["worse"] == ["dots"] and not one["promote"]
    written(tmp_path / "b", lost, episodes=40)
    plain = compare_runs({"dots": tmp_path / "a"}, {"dots": tmp_path / "b"}, margin=-0.05)["suites"]["dots"]
    assert plain["upper"] - plain["lower"] < one["upper"] - one["lower"] and plain["p_value"] < 0.001
    turned = compare_runs({"dots": tmp_path / "b"}, {"dots": tmp_path / "a"}, margin=-0.05)["suites"]["dots"]
    assert turned["p_value"] == plain["p_value"] and not turned["stopped"]


def test_progress_says_success_with_its_interval():
    rows = {index: {"success": index < 8} for index in range(10)}
    assert score(rows) == "success 8/10 = 80% [49%, 94%]"
    json.dumps(score(rows))


def test_early_stopping_in_pairs_reads_the_earlier_run_in_the_plans_order(tmp_path):
    written(tmp_path, set(), suite=SUITE)
    args = Namespace(alpha=0.05, beta=0.05)
    plan = make_plan(SUITE, CHUNK, SuiteSettings(episodes=60))
    reader = early_stop((0.3, 0.9), args, tmp_path, Console())(plan)
    assert reader([False] * 3) is None
    plain, told = PairedTest(0.3, 0.9, 60).read([(False, True)] * 60), reader([False] * 60)
    assert plain and (told.decision, told.at, told.p_value) == (plain.decision, plain.at, plain.p_value)
    assert told.interval.lower == 0 and told.method == "valid whenever one stops" and told.p_value <= 0.05
    assert reader([False] * 60).decision == "worse"
    with pytest.raises(DataError, match=r"lacks episodes of this plan.*30 missing, first \w+, initial state 0"):
        early_stop((0.3, 0.9), args, tmp_path, Console())(make_plan(SUITE, CHUNK, SuiteSettings(episodes=90)))
    with pytest.raises(ConfigError, match="episodes cannot tell"):
        early_stop((0.85, 0.9), args, None, Console())(plan)
    for wrong in ("0.9", "a,b", "1,2,3"):
        with pytest.raises(ConfigError, match="Two rates"):
            read_rates(wrong)
    assert read_rates("0.75, 0.9") == (0.75, 0.9) and earlier_run(tmp_path, "dots") == tmp_path
    with pytest.raises(DataError, match="no episodes of this suite"):
        earlier_run(tmp_path / "none", "dots")
