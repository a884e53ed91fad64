"""The policy as MLflow sees it: a models-from-code `PythonModel` around a PRTS package.

MLflow runs this file to load the model. Nothing is pickled: the package's safetensors are the weights.
The code is imported from a checkout of the project; requirements.txt lists what that needs of others.

`predict` takes a dict of arrays, one row an observation:

    observation.state   (B, D) float32, in the robot's units and the contract's order
    <camera key>        (B, height, width, 3) uint8, one entry for each camera of the contract
    prompt              (B,) str

and returns actions (B, chunk, A) float32 in the robot's units. `params={"seed": n}` seeds the flow's noise: row i of a
batch uses n + i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class PrtsPolicyModel(PythonModel):
    """Loads the package stored beside this file and answers with action chunks."""

    _skip_type_hint_validation = True  # MLflow would read a signature from type hints on `predict`; ours is given

    def load_context(self, context: Any) -> None:
        from prts_core.delivery.verify import verify_package
        from prts_core.policy.policy import load_policy

        folder = Path(context.artifacts["package"])
        verify_package(folder)
        self.policy = load_policy(folder)

    def predict(self, context, model_input, params=None):
        """Actions (B, chunk, A) float32 for a dict of arrays as in the module's docstring."""
        cameras = [camera.key for camera in self.policy.contract.contract.cameras]
        seen = {key: np.asarray(model_input[key], dtype=np.uint8) for key in cameras}
        seen["observation.state"] = np.asarray(model_input["observation.state"], dtype=np.float32)
        prompts = [str(text) for text in np.asarray(model_input["prompt"]).reshape(-1)]
        seed = int((params or {}).get("seed", 0))
        return self.policy.act(seen, prompts, [seed + row for row in range(len(prompts))])


set_model(PrtsPolicyModel())
