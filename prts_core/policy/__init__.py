"""Hold a policy as its users do: processor, observation, act, value, subtasks."""
