// Keeping the end in sight while an answer grows, until the user scrolls up.

const NEAR = 48; // pixels from the end that count as being there

export class Follower {
  #view;
  #jump;
  #following = true;
  #last = 0; // where the view was scrolled to

  /** `view` scrolls what is in `content`; `jump` is the button that goes back to the end. */
  constructor(view, content, jump) {
    this.#view = view;
    this.#jump = jump;
    view.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    jump.addEventListener("click", () => this.toEnd());
    const resized = new ResizeObserver(() => this.#resized());
    resized.observe(view);
    resized.observe(content);
  }

  /** Goes to the end and stays there. */
  toEnd() {
    this.#following = true;
    this.#resized();
  }

  #resized() {
    if (this.#following) this.#view.scrollTop = this.#view.scrollHeight;
    this.#show();
  }

  #scrolled() {
    const up = this.#view.scrollTop < this.#last;
    this.#last = this.#view.scrollTop;
    if (this.#far() <= NEAR) this.#following = true;
    else if (up) this.#following = false;
    this.#show();
  }

  #far() {
    return this.#view.scrollHeight - this.#view.clientHeight - this.#view.scrollTop;
  }

  #show() {
    this.#jump.hidden = this.#following || this.#far() <= NEAR;
  }
}
