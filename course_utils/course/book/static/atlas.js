"use strict";
// Filters of the atlas, and the machine whose verdicts "Which technique when" shows.
(() => {
  const value = (id) => document.getElementById(id)?.value ?? "";
  const form = document.getElementById("filters");

  function filter() {
    const [technique, kind, verdict] = ["technique", "kind", "verdict"].map((n) => value(`filter-${n}`));
    let shown = 0;
    const claims = document.querySelectorAll(".claim");
    for (const claim of claims) {
      let rows = 0;
      for (const row of claim.querySelectorAll(".machine")) {
        const fits = (!kind || row.dataset.kind === kind) && (!verdict || row.dataset.verdict === verdict);
        row.hidden = !fits;
        rows += fits;
      }
      const asked = !technique || claim.classList.contains(technique);
      claim.hidden = !(asked && (rows > 0 || !(kind || verdict)));
      shown += !claim.hidden;
    }
    for (const part of document.querySelectorAll("section")) {
      const own = part.querySelectorAll(":scope > .claim");
      if (own.length) part.hidden = [...own].every((claim) => claim.hidden);
    }
    document.getElementById("shown").textContent = `${shown} of ${claims.length} claims`;
  }

  function choose() {
    for (const badge of document.querySelectorAll(".promise .badge"))
      badge.hidden = badge.dataset.machine !== value("machine");
  }

  form?.addEventListener("change", filter);
  form?.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("machine")?.addEventListener("change", choose);
  filter();
  choose();
})();
