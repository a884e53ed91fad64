"""SimplerEnv's WidowX tasks as ManiSkill3 carries them."""
