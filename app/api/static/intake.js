// Ways for images to come in: picked, dropped anywhere on the page, pasted, or an example.

import { byId } from "./dom.js";

/** Hand every image that comes in to `take(blob, name)`. */
export function listen(take) {
  pickers(take);
  drops(take);
  document.addEventListener("paste", (event) => takeAll(event.clipboardData?.files, take));
  for (const button of byId("examples").querySelectorAll("button")) {
    button.addEventListener("click", () => example(button.dataset.example, take));
  }
}

function pickers(take) {
  const files = byId("files");
  byId("pick").addEventListener("click", () => files.click());
  files.addEventListener("change", () => {
    takeAll(files.files, take);
    files.value = ""; // the same file may be picked again
  });
}

function drops(take) {
  const zone = byId("drop");
  let depth = 0; // enter and leave are told of every element on the way
  const show = (change) => {
    depth = change === 0 ? 0 : depth + change;
    zone.classList.toggle("over", depth > 0);
  };
  document.addEventListener("dragenter", () => show(1));
  document.addEventListener("dragleave", () => show(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    show(0);
    takeAll(event.dataTransfer?.files, take);
  });
}

function takeAll(files, take) {
  for (const file of files ?? []) take(file, file.name || "pasted image");
}

async function example(name, take) {
  try {
    const response = await fetch(`static/example-${name}.jpg`);
    if (response.ok) take(await response.blob(), `${name}.jpg`);
  } catch {
    // The server is away; the page says so already.
  }
}
