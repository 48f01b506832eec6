// What the user sets: instructions, sampling and theme, kept in this browser.

const SETTINGS = "bmojo-edge.settings";
const THEME = "bmojo-edge.theme";
const DEFAULTS = { system: "", temperature: "0.6", top_p: "1", max_tokens: "" };

export class Settings {
  #dialog = document.getElementById("settings");
  #form = this.#dialog.querySelector("form");
  #values = { ...DEFAULTS, ...stored() };

  constructor() {
    document.getElementById("theme").addEventListener("click", turnTheme);
    this.#dialog.addEventListener("close", () => {
      if (this.#dialog.returnValue !== "save") return;
      const given = Object.fromEntries(new FormData(this.#form));
      this.#values = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, given[name] ?? DEFAULTS[name]]));
      localStorage.setItem(SETTINGS, JSON.stringify(this.#values));
    });
    document.getElementById("defaults").addEventListener("click", () => this.#fill(DEFAULTS));
  }

  open() {
    this.#fill(this.#values);
    this.#dialog.returnValue = "";
    this.#dialog.showModal();
  }

  /** Instructions for new conversations; empty: none. */
  get system() {
    return this.#values.system.trim();
  }

  /** Sampling as a request has it; what is left out is the server's choice. */
  get sampling() {
    const { temperature, top_p, max_tokens } = this.#values;
    const numbers = { temperature, top_p, max_tokens };
    return Object.fromEntries(
      Object.entries(numbers).flatMap(([name, text]) => (text === "" ? [] : [[name, Number(text)]])),
    );
  }

  #fill(values) {
    for (const [name, value] of Object.entries(values)) this.#form.elements[name].value = value;
  }
}

function stored() {
  try {
    const values = JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
    return Object.fromEntries(Object.entries(values).filter(([, value]) => typeof value === "string"));
  } catch {
    return {}; // of another version, or written by hand
  }
}

/** From the theme that is seen to the other one; the system's is the default and not stored. */
function turnTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const other = (document.documentElement.dataset.theme ?? system) === "dark" ? "light" : "dark";
  if (other === system) {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(THEME);
  } else {
    document.documentElement.dataset.theme = other;
    localStorage.setItem(THEME, other);
  }
}
