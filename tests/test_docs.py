"""The examples in the docstrings of the public API, and that its reference leaves nothing out."""

import doctest
import re
from pathlib import Path

import pytest

import jaxquant as jq
from jaxquant.kernels.matmul import quantized_matmul

REFERENCE = Path(__file__).parent.parent / ".docs"
PUBLIC = {name: getattr(jq, name) for name in re.findall(r" as (\w+)$", Path(jq.__file__).read_text(), re.MULTILINE)}
PUBLIC["kernels.matmul.quantized_matmul"] = quantized_matmul
TESTS = [test for name, found in PUBLIC.items() for test in doctest.DocTestFinder().find(found, name) if test.examples]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_examples(test):
    runner = doctest.DocTestRunner(verbose=False)
    told = []
    runner.run(test, out=told.append)
    assert not runner.failures, "".join(told)


def test_what_is_used_most_has_an_example():
    """Else the test above could run nothing."""
    used = {
        "QuantSpec",
        "calibrate",
        "compare",
        "dequantize",
        "fake_quantize",
        "fake_quantized",
        "int4",
        "load_pretrained",
    }
    used |= {"perplexity", "prepare", "quantize", "quantize_params", "quantized", "kernels.matmul.quantized_matmul"}
    assert used <= {test.name for test in TESTS}


def test_the_reference_has_every_public_name():
    pages = "".join(path.read_text() for path in sorted(REFERENCE.glob("*.rst")))
    listed = re.findall(r"^\.\. auto(?:class|function):: jaxquant\.([\w.]+)$", pages, re.MULTILINE)
    returned = [name for name in listed if name.startswith("transforms.")]  # by public functions; users import none
    assert sorted(set(listed) - set(returned)) == sorted(PUBLIC)
    assert len(listed) == len(set(listed))
