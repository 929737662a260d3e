"""Settings of runs that take seconds and write a checkpoint after each step."""

SMALL = """\
  trainer.max_epochs: 3
  data.world.families: 4
  data.world.train_per_family: 2
  data.world.test_per_family: 2
  rollouts.tasks_per_step: 4
  checkpoint_every_steps: 1
  verification.samples: 1
  verification.final_samples: 2
  verification.pass_at: [1, 2]
"""
