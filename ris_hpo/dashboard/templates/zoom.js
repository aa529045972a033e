// A click on a trial's figure shows it large; Escape, or another click, closes it.
"use strict";
document.addEventListener("click", (event) => {
  const image = event.target;
  if (!(image instanceof HTMLImageElement) || !image.src.includes("/artifacts/")) return;
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-label", image.alt || "figure");
  dialog.style.cssText = "padding:0;border:0;border-radius:8px;max-width:96vw;max-height:96vh;cursor:zoom-out";
  const large = document.createElement("img");
  large.src = image.src;
  large.alt = image.alt;
  large.style.cssText = "display:block;width:min(94vw,1100px);max-height:94vh;object-fit:contain";
  dialog.append(large);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
});
