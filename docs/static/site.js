/* Code and tables that are wider than their frame scroll inside it: let the keyboard reach those, and no others. */
"use strict";

(() => {
  const FRAMES = "article pre, article .table-wrapper, article .math-wrapper, article mjx-container";

  function mark() {
    for (const frame of document.querySelectorAll(FRAMES)) {
      if (frame.scrollWidth > frame.clientWidth) frame.tabIndex = 0;
      else frame.removeAttribute("tabindex");
    }
  }
  window.addEventListener("load", mark);
  window.addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true);             // what was folded has a width only now
})();

/* Pictures that the column makes much smaller than they are lead to themselves. */
window.addEventListener("load", () => {
  for (const image of document.querySelectorAll("article img")) {
    const shrunk = image.clientWidth && image.naturalWidth > 1.3 * image.clientWidth;
    if (!shrunk || image.closest("a") || image.closest(".explore")) continue;
    const link = document.createElement("a");
    link.href = image.src;
    link.className = "whole";
    link.title = "open in full size";
    image.replaceWith(link);
    link.append(image);
  }
});

/* From a disk a page may not read others: the search then names the pages it found without a piece of each. */
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
