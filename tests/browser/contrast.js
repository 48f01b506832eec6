// Texts whose contrast with their ground is below WCAG's 4.5.
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (colour) =>
  colour
    .slice(0, 3)
    .map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const found = [];
for (const one of document.querySelectorAll("body *")) {
  const text = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (
    !text ||
    !one.checkVisibility({ visibilityProperty: true, opacityProperty: true }) ||
    one.closest(":disabled, .off-screen, .skip")
  )
    continue;
  let ground = one;
  while (ground.parentElement && rgb(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
  const [a, b] = [light(rgb(getComputedStyle(one).color)), light(rgb(getComputedStyle(ground).backgroundColor))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5)
    found.push(`${one.tagName}.${one.className} ${one.textContent.slice(0, 30)}: ${contrast.toFixed(2)}`);
}
return found;
