"""`gpvae bench`: the project's speed table. Ratios are measured in turns within one run.

`measure` has what every section shares, `floor`, `models`, `choices`, `memory` and `peers` are
the sections, `report` prints, saves and draws. Nothing heavy is imported before a command runs.
"""
