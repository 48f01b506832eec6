// Before anything is drawn: the theme that was chosen. Without a choice the system's holds.
"use strict";

(() => {
  const chosen = localStorage.getItem("bmojo-edge.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
