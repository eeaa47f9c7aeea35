"""SDDP from Python: train a policy on two processes, look at it, simulate it.

    python planning.py [CASE]

`CASE` is a Cobre case directory; unset, the one that the package ships: four reservoirs in a
cascade. Needs `pip install "cobre-shm[sddp]"`. The workers are processes of their own, and do not
import this file, so there is no `if __name__ == "__main__"`.
"""

import sys

import numpy as np

import cobre_shm
from cobre_shm.sddp import shipped_case_path

case = sys.argv[1] if len(sys.argv) > 1 else shipped_case_path()
shorter = {"training": {"stopping_rules": [{"type": "iteration_limit", "limit": 12}]}}


def watch(event):
    """Called for every iteration of every worker; True would end the training."""
    if event.worker_id == 0 and event.iteration % 4 == 0:
        print(f"iteration {event.iteration}: gap {event.gap_percent:.2f} %")


result = cobre_shm.train(case, num_workers=2, config_overrides=shorter, progress_callback=watch)
bounds = result.history["lower_bound"]
print(f"lower bound {bounds[0]:.4g} -> {bounds[-1]:.4g} $ in {result.iterations} iterations")

# The value of water: what the future costs at the first stage if the reservoirs are fuller.
states = len(result.policy.components)
empty, full = (result.policy.evaluate(stage=0, state=np.full(states, x)) for x in (0.0, 50.0))
print(f"future cost {empty:.4g} $ with empty reservoirs, {full:.4g} $ with 50 hm3 in each")

outcome = cobre_shm.simulate(case, result, scenarios=50, num_workers=2)
print(f"simulated cost {outcome.total_cost.mean():.4g} $ over {len(outcome.total_cost)} scenarios")

# What must hold: bounds only rise, water is worth something, and one process gives the same bits.
assert np.all(np.diff(bounds) >= -1e-9 * abs(bounds[-1]))
assert full <= empty
alone = cobre_shm.train(case, config_overrides=shorter)
assert np.array_equal(alone.history["lower_bound"], bounds)
