"""grpo.py with another checkpoint as the judge that answers, which never learns: how good must a judge be?

    python -m experiments.judged FOLDER [grpo.py's flags]
"""

import sys

import grpo
from model import load
from sample import run


class Judged(grpo.Run):
    """A run whose pictures another model is asked about."""

    judge_folder = ""

    def __init__(self, *args):
        super().__init__(*args)
        self.answerer = load(self.judge_folder, self.device)


if __name__ == "__main__":
    Judged.judge_folder = sys.argv.pop(1)
    grpo.Run = Judged
    run(grpo.main)
