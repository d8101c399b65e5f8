"use strict";
// Guess first. All data stand in the page; nothing is fetched, sent or stored.
(() => {
  const data = JSON.parse(document.getElementById("guess-data").textContent);
  const root = document.getElementById("guess");
  const SURE = [50, 60, 70, 80, 90, 100]; // percent
  let questions, answers, machine;

  /** An element with properties and children; text is text, never markup. */
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  /** Random numbers from 0 to 1; with #seed=7 in the address the same ones every time. */
  function dice() {
    const given = /seed=(\d+)/.exec(location.hash);
    if (!given) return Math.random;
    let state = Number(given[1]);
    return () => {
      state = (state * 1664525 + 1013904223) % 4294967296;
      return state / 4294967296;
    };
  }

  function drawn(from, n) {
    const random = dice();
    const left = [...from];
    const picked = [];
    while (left.length && picked.length < n)
      picked.push(left.splice(Math.floor(random() * left.length), 1)[0]);
    return picked;
  }

  /** Show these elements, and move the focus to the heading: a screen reader reads on from there. */
  function show(...children) {
    root.replaceChildren(...children);
    const heading = root.querySelector("h2");
    heading.tabIndex = -1;
    heading.focus({ preventScroll: true });
    root.scrollIntoView({ block: "start" });
  }

  function choice(name, value, text, checked = false) {
    const input = make("input", { type: "radio", name, value, checked, required: true });
    return make("label", { className: "choice" }, input, ` ${text}`);
  }

  function start() {
    const select = make("select", { id: "guess-machine" });
    for (const one of data.machines.filter((m) => m.decided.length))
      select.append(make("option", { value: one.name }, one.label));
    const form = make(
      "form", {},
      make("h2", {}, "Which machine?"),
      make("p", {}, make("label", {}, "The claims shall hold or fail on ", select)),
      make("button", { type: "submit", className: "answer" }, "Draw the claims"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      machine = data.machines.find((one) => one.name === select.value);
      const pool = data.claims.filter((claim) => machine.decided.includes(claim.id));
      questions = drawn(pool, data.draw);
      answers = [];
      ask();
    });
    root.replaceChildren(form);
  }

  function ask() {
    const claim = questions[answers.length];
    const measured = claim.said[machine.name];
    const number = make("input", { type: "number", step: "any", inputMode: "decimal", name: "number" });
    const wanted = measured.value !== null && claim.unit !== "";
    const form = make(
      "form", {},
      make("h2", {}, `Claim ${answers.length + 1} of ${questions.length}`),
      make("blockquote", {}, claim.statement),
      make("p", {}, make("small", {}, `Source: ${claim.source}`)),
      make("p", {}, `Condition: ${claim.condition}.` + (claim.stand_in ? ` On a stand-in: ${claim.stand_in}.` : "")),
      make("p", {}, `It holds for ${claim.band}.`),
      make("fieldset", {}, make("legend", {}, `On ${machine.label} it`),
        choice("guess", "holds", "holds"), choice("guess", "fails", "fails")),
      make("fieldset", {}, make("legend", {}, "How sure are you?"),
        ...SURE.map((percent) => choice("sure", percent, `${percent}%`, percent === 70))),
      wanted ? make("p", {}, make("label", {}, "What was measured, if you dare: ", number, ` ${claim.unit}`)) : null,
      make("button", { type: "submit", className: "answer" }, "Answer"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const given = new FormData(form);
      answers.push({
        claim,
        guess: given.get("guess"),
        sure: Number(given.get("sure")) / 100,
        right: given.get("guess") === measured.word,
        number: given.get("number") ? Number(given.get("number")) : null,
        measured: measured.value,
      });
      reveal();
    });
    show(form);
  }

  function reveal() {
    const { claim, guess, right, number } = answers[answers.length - 1];
    const rows = data.machines.filter((one) => claim.said[one.name]).map((one) => {
      const said = claim.said[one.name];
      const badge = make("span", { className: `badge v-${said.kind}` }, said.word);
      return make("li", {}, badge, ` ${one.label}: `, make("b", {}, said.text));
    });
    const last = answers.length === questions.length;
    const next = make("button", { type: "button", className: "answer" }, last ? "See how you did" : "Next claim");
    next.addEventListener("click", last ? finish : ask);
    show(
      make("h2", {}, right ? `Right: it ${guess}` : `It ${guess === "holds" ? "fails" : "holds"}, and you said it ${guess}`),
      make("blockquote", {}, claim.statement),
      number === null ? null : make("p", {}, `You guessed ${number} ${claim.unit}.`),
      make("ul", { className: "forest" }, ...rows),
      make("p", {}, claim.reason),
      make("p", {}, "The chapter: ", make("a", { href: claim.page }, claim.chapter)),
      next,
    );
    next.focus({ preventScroll: true });
  }

  /** Within a factor of two; where a ratio has no sense, within half of the measured number. */
  function near({ number, measured }) {
    if (number > 0 && measured > 0) return number / measured <= 2 && measured / number <= 2;
    return Math.abs(number - measured) <= Math.abs(measured) / 2;
  }

  function finish() {
    const right = answers.filter((one) => one.right).length;
    const sure = answers.reduce((sum, one) => sum + one.sure, 0) / answers.length;
    const brier = answers.reduce((sum, one) => sum + (one.sure - one.right) ** 2, 0) / answers.length;
    const share = right / answers.length;
    const gap = Math.round(100 * (sure - share));
    const told = Math.abs(gap) <= 10
      ? "you were about as right as you were sure"
      : gap > 0 ? "you were surer than you were right" : "you were right more often than you believed";
    const numbers = answers.filter((one) => one.number !== null);
    const rows = SURE.map((percent) => answers.filter((one) => Math.round(100 * one.sure) === percent));
    const table = make("table", {}, make("caption", {}, "As sure as right?"),
      make("thead", {}, make("tr", {}, ...["sure", "claims", "right"].map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...rows.flatMap((group, i) => group.length
        ? [make("tr", {}, make("th", { scope: "row" }, `${SURE[i]}%`), make("td", {}, String(group.length)),
            make("td", {}, String(group.filter((one) => one.right).length)))]
        : [])));
    const again = make("button", { type: "button", className: "answer" }, "Play again");
    again.addEventListener("click", start);
    show(
      make("h2", {}, `${right} of ${answers.length} right`),
      make("p", { id: "calibration" }, `You were ${Math.round(100 * sure)}% sure and ${Math.round(100 * share)}% right: ${told}.`),
      make("p", { id: "brier" }, `Brier score ${brier.toFixed(2)}: 0 is perfect, 0.25 is what a coin gets that is 50% sure of everything.`),
      numbers.length ? make("p", { id: "numbers" }, `Numbers: ${numbers.filter(near).length} of ${numbers.length} within a factor of two.`) : null,
      table,
      again,
    );
  }

  start();
})();
