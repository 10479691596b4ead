"use strict";
(() => {
  const tip = document.getElementById("tip");
  let shown = null;

  const show = (mark) => {
    if (shown === mark) return;
    if (shown) shown.classList.remove("near");
    shown = mark;
    tip.hidden = !mark;
    if (!mark) return;
    mark.classList.add("near");
    tip.textContent = mark.getAttribute("aria-label");
    const at = mark.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const middle = at.left + at.width / 2 - own.width / 2;
    const above = at.top - own.height - 8;
    tip.style.left = Math.max(6, Math.min(middle, innerWidth - own.width - 6)) + "px";
    tip.style.top = (above < 6 ? at.bottom + 8 : above) + "px";
  };

  const middle = (mark) => {
    const at = mark.getBoundingClientRect();
    return [at.left + at.width / 2, at.top + at.height / 2];
  };

  for (const figure of document.querySelectorAll("svg.figure")) {
    const marks = [...figure.querySelectorAll(".mark")];
    for (const mark of marks) {
      // Without a title, the browser shows no tooltip of its own.
      const title = mark.querySelector("title");
      mark.setAttribute("aria-label", title.textContent);
      title.remove();
    }
    const nearest = (event) => {
      if (event.target.classList.contains("mark")) return show(event.target);
      let best = null;
      let least = 26 * 26;
      for (const mark of marks) {
        const [x, y] = middle(mark);
        const far = (x - event.clientX) ** 2 + (y - event.clientY) ** 2;
        if (far < least) [best, least] = [mark, far];
      }
      show(best);
    };
    figure.addEventListener("pointermove", nearest);
    figure.addEventListener("pointerdown", nearest);
    figure.addEventListener("pointerleave", () => show(null));
    figure.addEventListener("focusin", (event) => show(event.target));
    figure.addEventListener("focusout", () => show(null));
    figure.addEventListener("keydown", (event) => {
      const here = marks.indexOf(document.activeElement);
      const last = marks.length - 1;
      const to = {
        ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1,
        Home: 0, End: last,
      }[event.key];
      if (here < 0 || to === undefined) return;
      event.preventDefault();
      const next = marks[Math.max(0, Math.min(to, last))];
      marks[here].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  addEventListener("keydown", (event) => { if (event.key === "Escape") show(null); });
  addEventListener("scroll", () => show(null), { passive: true });

  for (const button of document.querySelectorAll("button[data-copy]")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      button.textContent = "copied";
    });
  }

  // Open what a reader on paper cannot.
  const closed = [];
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) {
      if (part.dataset.print === "no") continue;
      part.open = true;
      closed.push(part);
    }
  });
  addEventListener("afterprint", () => { for (const part of closed.splice(0)) part.open = false; });
  document.documentElement.dataset.ready = "yes";
})();
