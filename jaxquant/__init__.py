"""Post-training quantization of large language models in JAX: the public API."""

from jaxquant.evaluation.metrics import Comparison as Comparison
from jaxquant.evaluation.metrics import Estimate as Estimate
from jaxquant.evaluation.metrics import compare as compare
from jaxquant.evaluation.metrics import perplexity as perplexity
from jaxquant.methods.gptq import GPTQ as GPTQ
from jaxquant.methods.rtn import RTN as RTN
from jaxquant.models.model import Model as Model
from jaxquant.numerics.affine import choose_qparams as choose_qparams
from jaxquant.numerics.affine import dequantize as dequantize
from jaxquant.numerics.affine import fake_quantize as fake_quantize
from jaxquant.numerics.affine import quantize as quantize
from jaxquant.numerics.qtensor import QTensor as QTensor
from jaxquant.numerics.spec import ActivationSpec as ActivationSpec
from jaxquant.numerics.spec import QuantSpec as QuantSpec
from jaxquant.numerics.spec import int3 as int3
from jaxquant.numerics.spec import int4 as int4
from jaxquant.numerics.spec import int8 as int8
from jaxquant.pretrained import load as load
from jaxquant.pretrained import load_pretrained as load_pretrained
from jaxquant.pretrained import save as save
from jaxquant.transforms.calibrate import Statistics as Statistics
from jaxquant.transforms.calibrate import calibrate as calibrate
from jaxquant.transforms.quantize import quantize_params as quantize_params
from jaxquant.transforms.quantized import quantized as quantized
from jaxquant.transforms.report import LayerReport as LayerReport
from jaxquant.transforms.report import Report as Report
