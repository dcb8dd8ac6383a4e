let timer;
const chosen = {};  // colour of the marked expert, by side
// Darkens the patches of other experts on a map. A map has one pixel for each patch.
function mark(img) {
  const map = img.closest(".map");
  if (!map) return;
  map.querySelector("canvas")?.remove();
  const side = img.closest("section");
  const colour = chosen[[...element.querySelectorAll("section")].indexOf(side)];
  side.querySelectorAll(".legend button").forEach((chip) => {
    chip.setAttribute("aria-pressed", chip.dataset.colour === colour);
  });
  if (!colour) return;
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
  pen.drawImage(img, 0, 0);
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const hex = [...pixels.data.slice(i, i + 3)].map((c) => c.toString(16).padStart(2, "0"));
    pixels.data.set([0, 0, 0, `#${hex.join("")}` === colour ? 0 : 200], i);
  }
  pen.putImageData(pixels, 0, 0);
  map.append(canvas);
}
element.addEventListener("load", (e) => mark(e.target), true);
function show(step) {
  element.querySelectorAll("img").forEach((img, i) => { img.src = props.value.frames[step][i]; });
  element.querySelectorAll("section").forEach((side) => {
    side.style.setProperty("--image", `url(${side.querySelector("img").src})`);
  });
  element.querySelector("input").value = step;
  element.querySelector("output").textContent = props.value.steps[step];
}
function play(step) {
  clearInterval(timer);
  show(step);
  timer = setInterval(() => {
    if (step < props.value.last) show(++step); else clearInterval(timer);
  }, 2500 / (props.value.last + 1));
}
element.addEventListener("input", (e) => { clearInterval(timer); show(Number(e.target.value)); });
element.addEventListener("click", (e) => {
  if (e.target.closest(".steps button")) play(0);
  const chip = e.target.closest(".legend button"), side = e.target.closest("section");
  if (!chip) return;
  const i = [...element.querySelectorAll("section")].indexOf(side);
  chosen[i] = chosen[i] === chip.dataset.colour ? null : chip.dataset.colour;
  side.querySelectorAll(".map img").forEach(mark);
});
watch("value", () => {
  clearInterval(timer);
  if (!props.value || props.value.grid) return;
  if (props.value.live) return show(props.value.last);
  play(0);
});
