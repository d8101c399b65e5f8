"""A figure with sliders, and a figure as HTML: what a front end does with pictures."""

from base64 import b64encode
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipywidgets import VBox


def explore(picture: Callable[..., None], **knobs: object) -> "VBox":
    """Sliders over a figure: `picture` shows one by `plots.show`, and is called again with a knob's
    new value.

    A knob is a widget (`ipywidgets.IntSlider(...)`) or a list of choices. In place of
    `ipywidgets.interact`, whose Output widget sometimes leaves papermill waiting for ever: to fill
    it, papermill sends on the socket on which it awaits the cell's reply, and the reply is then not
    noticed (nbclient's issue 312).

    >>> def picture(n):
    ...     plots.lines([1, 2], {"n·x": [n, 2 * n]}, xlabel="x", ylabel="y", title="", alt="")
    >>> explore(picture, n=[1, 2, 4])  # doctest: +SKIP
    VBox(children=(Dropdown(description='n', options=(1, 2, 4), value=1), HTML(value='<img …')))
    """
    import ipywidgets
    from IPython.utils.capture import capture_output

    knobs = {
        n: k if isinstance(k, ipywidgets.Widget) else ipywidgets.Dropdown(options=k)
        for n, k in knobs.items()
    }
    frame = ipywidgets.HTML()

    def draw() -> None:
        with capture_output() as shown:
            picture(**{name: knob.value for name, knob in knobs.items()})
        pictures = ((o.data["image/png"], o.metadata["image/png"]["alt"]) for o in shown.outputs)
        frame.value = "".join(as_html(png, alt) for png, alt in pictures)

    def redraw(_: object) -> None:
        try:
            draw()
        except Exception as error:  # a slider's error is lost in the log of the kernel otherwise
            frame.value = f"<pre>{escape(f'{type(error).__name__}: {error}')}</pre>"

    for name, knob in knobs.items():
        knob.description = knob.description or name
        knob.observe(redraw, "value")
    draw()
    return ipywidgets.VBox([*knobs.values(), frame])


def as_html(png: bytes, alt: str) -> str:
    """A figure as an HTML image that carries its alternative text.

    >>> as_html(b"png", 'A "line".')
    '<img alt="A &quot;line&quot;." src="data:image/png;base64,cG5n">'
    """
    data = b64encode(png).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
