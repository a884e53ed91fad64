"""Hold a policy as its users do: processor, observation, act, value, subtasks; the client of one that is served."""
