"""Train the shipped baseline: chapter 02's recipe in `full`, on the 55,000 training images. Minutes
on two cores.

    course data --full && python datasets/make_baseline.py

Validation watches; the test images are looked at once, at the end.
"""

from pathlib import Path

from safetensors.torch import save_file

from course_utils import data, models, training

HERE = Path(__file__).resolve().parent
RECIPE = training.Recipe(epochs=8, seed=1)


def main() -> None:
    model = models.mini_resnet(32, seed=RECIPE.seed)
    history = training.fit(model, *data.fashion_mnist("train", full=True), RECIPE)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, HERE / "baseline.safetensors"
    )
    valid = training.accuracy(model, *data.fashion_mnist("validation", full=True))
    test = training.accuracy(model, *data.fashion_mnist("test"))
    print(f"loss {history.loss}\n{history.seconds:.0f} s, validation {valid:.4f}, test {test:.4f}")


if __name__ == "__main__":
    main()
