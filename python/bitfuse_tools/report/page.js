"use strict";
(() => {
  const all = (where, what) => [...where.querySelectorAll(what)];
  const make = (tag, props = {}) => Object.assign(document.createElement(tag), props);
  document.documentElement.classList.add("js");
  const tip = document.querySelector(".tip");

  // devices: one at a time; an address with a section's name shows the device that has it
  const devices = all(document, ".device");
  const choose = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const shown = (target && target.closest(".device")) || devices[0];
    devices.forEach((d) => (d.hidden = d !== shown));
    all(document, ".devices a").forEach((a) =>
      a.hash === "#" + shown.id ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current"));
    if (target) target.scrollIntoView();
  };
  if (devices.length > 1) {
    addEventListener("hashchange", choose);
    choose();
  }

  // a figure of several charts: a list to choose from
  all(document, "figure").forEach((figure) => {
    const plots = all(figure, ".plot");
    if (plots.length < 2) return;
    const title = figure.querySelector("strong").textContent;
    const select = make("select", { ariaLabel: title + ": which" });
    plots.forEach((plot, at) => select.append(make("option", { value: at, textContent: plot.dataset.choice })));
    const show = () => plots.forEach((plot, at) => (plot.hidden = at !== +select.value));
    select.addEventListener("change", show);
    figure.querySelector("figcaption").append(select);
    show();
  });

  // tables: sorted by a column's head, filtered by words
  all(document, "table.sortable").forEach((table) => {
    const heads = all(table, "thead th"), body = table.tBodies[0], rows = [...body.rows];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const value = (row, at, numeric) => {
      const text = row.cells[at].textContent.trim();
      if (!numeric) return text.toLowerCase();
      const number = text === "exact" ? 0 : text === "" ? NaN : Number(text);
      return Number.isNaN(number) ? null : number; // words, such as "in cache", are last
    };
    heads.forEach((head, at) => {
      const button = make("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      const numeric = head.classList.contains("n");
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const keyed = rows.map((row) => [value(row, at, numeric), row]);
        keyed.sort(([a], [b]) =>
          a === null ? (b === null ? 0 : 1) : b === null ? -1 : (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1));
        body.append(...keyed.map(([, row]) => row));
      });
    });
    const scroll = table.closest(".tall");
    if (!scroll) return;
    const tools = make("div", { className: "tools" });
    const input = make("input", { type: "search", placeholder: "Filter: words, such as int4 bf16" });
    input.setAttribute("aria-label", "Filter the cases by words");
    const count = make("span");
    count.setAttribute("role", "status");
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      rows.forEach((row, at) => {
        row.hidden = !words.every((word) => texts[at].includes(word));
        left += !row.hidden;
      });
      count.textContent = words.length ? `${left} of ${rows.length}` : "";
    });
    tools.append(input, count);
    scroll.before(tools);
  });

  // marks: what the table says of them, beside the pointer or, by arrow keys, beside the mark
  let follow = null; // the mark whose words stay beside it while the page scrolls: reached by keys
  const hide = () => {
    follow = null;
    tip.hidden = true;
    all(document, ".p.at").forEach((mark) => mark.classList.remove("at"));
  };
  all(document, "section.op").forEach((op) => {
    const table = op.querySelector("table");
    const rows = table ? [...table.tBodies[0].rows] : [];
    const heads = table ? all(table, "thead th").map((head) => {
      const [name, unit] = [head.querySelector("span").firstChild.textContent.trim(), head.querySelector("i")];
      return [name, unit ? unit.textContent : ""];
    }) : [];
    const tell = (mark, x, y) => {
      hide();
      mark.classList.add("at");
      const row = rows[+mark.dataset.r], list = make("dl");
      const [first, dtype, ...rest] = [...row.cells].map((cell) => cell.textContent.trim());
      rest.forEach((text, at) => {
        const [name, unit] = heads[at + 2];
        if (text) list.append(make("dt", { textContent: name }), make("dd", { textContent: (text + " " + unit).trim() }));
      });
      tip.replaceChildren(make("b", { textContent: first + ", " + dtype }), list);
      tip.hidden = false;
      const { width, height } = tip.getBoundingClientRect();
      const left = x + 14 + width < innerWidth ? x + 14 : Math.max(8, Math.min(x - 14 - width, innerWidth - width - 8));
      const top = y + 14 + height < innerHeight ? y + 14 : Math.max(8, y - 14 - height);
      tip.style.left = Math.max(8, left) + "px";
      tip.style.top = top + "px";
    };
    const centre = (mark) => {
      const box = (mark.querySelector("rect") || mark).getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2];
    };
    all(op, ".plot svg").forEach((svg) => {
      const marks = all(svg, ".p");
      if (!marks.length) return;
      all(svg, ".p > title").forEach((title) => title.remove()); // the browser's own tip would lie over ours
      const near = (event) => {
        const on = event.target.closest(".p");
        if (on) return on;
        let best = null, least = 22;
        marks.forEach((mark) => {
          const [x, y] = centre(mark), far = Math.hypot(x - event.clientX, y - event.clientY);
          if (far < least) [best, least] = [mark, far];
        });
        return best;
      };
      const point = (event) => {
        const mark = near(event);
        mark ? tell(mark, event.clientX, event.clientY) : hide();
      };
      svg.addEventListener("pointermove", point);
      svg.addEventListener("pointerdown", point);
      svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
      svg.tabIndex = 0;
      svg.setAttribute("aria-roledescription", "chart; arrow keys read its marks");
      let at = -1;
      svg.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") return hide();
        if (!step) return;
        event.preventDefault();
        at = at < 0 ? (step > 0 ? 0 : marks.length - 1) : (at + step + marks.length) % marks.length;
        marks[at].scrollIntoView({ block: "nearest", behavior: "instant" });
        const beside = () => {
          tell(marks[at], ...centre(marks[at]));
          follow = beside;
        };
        beside();
      });
      svg.addEventListener("blur", hide);
    });

    // the legend: one series lit, the others faint
    const legend = all(op, ".legend li"), plots = op.querySelector(".plots");
    let held = null;
    const light = (item) => {
      plots.classList.toggle("lit", !!item);
      all(plots, ".on").forEach((mark) => mark.classList.remove("on"));
      if (item) all(plots, "." + item.dataset.s).forEach((mark) => mark.classList.add("on"));
    };
    legend.forEach((item) => {
      item.tabIndex = 0;
      item.setAttribute("role", "button");
      item.setAttribute("aria-pressed", "false");
      const press = () => {
        held = held === item ? null : item;
        legend.forEach((other) => other.setAttribute("aria-pressed", String(other === held)));
        light(held);
      };
      item.addEventListener("click", press);
      item.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        press();
      });
      item.addEventListener("mouseenter", () => light(item));
      item.addEventListener("mouseleave", () => light(held));
    });
  });
  addEventListener("scroll", () => (follow ? follow() : hide()), { passive: true });
})();
