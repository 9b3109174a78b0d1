"""The API reference, from the docstrings: sphinx-build -W .docs .docs/html."""

from jaxquant import __name__ as project

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"{project}: API reference"
html_show_copyright = False
exclude_patterns = ["html"]
default_role = "code"  # `x` is code in the docstrings, too
add_module_names = False
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True  # attributes stand in the docstring of their class, and nowhere else
napoleon_attr_annotations = False


def skip_member(app, what, name, member, skip, options):
    """Leaves out the fields of a NamedTuple, which its docstring describes."""
    return skip or type(member).__name__ == "_tuplegetter"


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_member)
