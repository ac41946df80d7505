"""`import model` is as cheap as importing a model of transformers."""

import subprocess
import sys

TRANSFORMERS_OWN = "from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeForCausalLM"
AUTO = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM"


def imported(code: str) -> set[str]:
    code = f"{code}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_model_imports_no_more_than_a_model_of_transformers():
    more = imported("import model") - imported(f"{TRANSFORMERS_OWN}; {AUTO}")
    assert {name for name in more if name.split(".")[0] != "model"} == set()
