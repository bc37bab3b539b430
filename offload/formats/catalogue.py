"""All stored forms by name: a form is one file in this folder and one row here."""

from collections.abc import Mapping

from ..checkpoint.experts import ExpertLayer
from .compressed import CompressedForm
from .form import Form
from .lossy.levelled import LevelledForm
from .lossy.low_bit import LowBitForm
from .lossy.ternary import TernaryForm
from .plain import PlainForm
from .quantised import form_name
from .quantised_forms import QUANTISED_FORMS
from .quantised_parts import is_quantised

FORMS: Mapping[str, type[Form]] = {
    "plain": PlainForm,
    "compressed": CompressedForm,
    "lowbit": LowBitForm,
    "levels": LevelledForm,
    "ternary": TernaryForm,
    **QUANTISED_FORMS,
}


def form_in_place(layer: ExpertLayer) -> Form:
    """How a checkpoint's own files store the experts of a layer.

    Raises:
        ValueError: if they are quantised, and cannot be read where they are.
    """
    return QUANTISED_FORMS[form_name(layer)](layer) if is_quantised(layer) else PlainForm(layer)
