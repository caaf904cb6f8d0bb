"use strict";
// The theme: what the reader chose last, else what the system prefers. The button names the other one.
window.dash_clientside = Object.assign({}, window.dash_clientside, {
  watch: {
    theme: function (clicks) {
      const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      let chosen = null;
      try { chosen = window.localStorage.getItem("dse-theme"); } catch (error) { chosen = null; }
      let theme = chosen === "dark" || chosen === "light" ? chosen : system;
      if (clicks) {
        theme = theme === "dark" ? "light" : "dark";
        try { window.localStorage.setItem("dse-theme", theme); } catch (error) { /* private mode */ }
      }
      document.documentElement.dataset.theme = theme;
      const button = document.getElementById("theme-button");
      if (button) { button.textContent = theme === "dark" ? "Light" : "Dark"; }
      return theme;
    },
  },
});
