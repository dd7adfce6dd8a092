// Small pictures of images, drawn once, so that no large image stays decoded.

const SIDE = 192;
const PIXEL_ART = 96; // smaller than this, pixels are shown as they are

/** A canvas that shows an image Blob, or a blank one where the browser cannot read it. */
export async function thumbnail(blob, name) {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", name);
  canvas.className = "thumbnail";
  canvas.width = canvas.height = 1;
  try {
    const image = await createImageBitmap(blob);
    draw(image, canvas);
    image.close();
  } catch {
    canvas.classList.add("unreadable");
  }
  return canvas;
}

/** Another canvas with the same picture. */
export function copyOf(canvas) {
  const copy = canvas.cloneNode();
  if (canvas.width > 1) copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}

function draw(image, canvas) {
  const longest = Math.max(image.width, image.height);
  const scale = Math.min(1, SIDE / longest);
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  if (longest < PIXEL_ART) canvas.classList.add("pixels");
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
}
