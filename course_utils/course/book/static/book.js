"use strict";
// What is wider than its place scrolls; then the keyboard must be able to reach it.
(() => {
  const WIDE = "article pre, .cell_output, .table-wrapper, .math-block";
  function mark() {
    for (const box of document.querySelectorAll(WIDE)) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  }
  addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true); // a fold that opens
  addEventListener("load", mark);
  mark();
})();
