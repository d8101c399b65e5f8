"""Sphinx's settings. The sources lie in the folder that `assemble` wrote."""

import datetime

from course_utils.course.book.make import HERE

project = "Efficient Deep Learning, Measured"
author = "the course's authors"
copyright = f"{datetime.date.today().year}, CC BY 4.0; code MIT"
extensions = ["myst_nb", "sphinx.ext.autodoc", "course_utils.course.book.extension"]
exclude_patterns = [".doctrees"]
language = "en"

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # a slider needs a kernel; the static figure beside it says the same
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

default_role = "code"  # what stands in single backticks in a docstring is code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = project
html_static_path = [str(HERE / "static")]
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
