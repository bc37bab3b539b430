"""All stored forms by name: a form is one file in this folder and one row here."""

from collections.abc import Mapping

from .compressed import CompressedForm
from .form import Form
from .plain import PlainForm

FORMS: Mapping[str, type[Form]] = {"plain": PlainForm, "compressed": CompressedForm}
