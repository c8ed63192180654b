"use strict";
(() => {
  const tip = document.getElementById("tip");
  const hide = () => {
    tip.hidden = true;
    document.querySelectorAll(".cursor").forEach((line) => { line.style.visibility = "hidden"; });
  };
  document.addEventListener("mousemove", (event) => {
    const target = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    if (!target) { hide(); return; }
    tip.textContent = target.getAttribute("data-tip");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
    const below = event.clientY + 16;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below + box.height < window.innerHeight ? below : event.clientY - box.height - 10}px`;
    const cursor = target.parentNode.querySelector(".cursor");
    if (cursor && target.dataset.x) {
      cursor.setAttribute("x1", target.dataset.x);
      cursor.setAttribute("x2", target.dataset.x);
      cursor.style.visibility = "visible";
    }
  });
  document.addEventListener("mouseleave", hide);
})();
