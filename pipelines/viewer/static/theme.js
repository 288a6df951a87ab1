// Before anything is drawn: the theme chosen last time.
"use strict";
(function () {
  try {
    const theme = localStorage.getItem("sae-theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch { /* a browser without storage follows the system */ }
})();
