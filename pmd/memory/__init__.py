"""The procedural memory: what verified rollouts teach, kept in SQLite and looked up by problem neighbourhood.

Enter: training tasks, their verified rollouts, the insights and behaviours that reflection writes. Leave: procedures
for the teacher's prompt. Nothing here imports torch, so the store opens on any machine.
"""
