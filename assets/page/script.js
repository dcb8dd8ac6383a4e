let timer;
function show(step) {
  element.querySelectorAll("img").forEach((img, i) => { img.src = props.value.frames[step][i]; });
  element.querySelectorAll("section").forEach((side) => {
    side.style.setProperty("--image", `url(${side.querySelector("img").src})`);
  });
  const slider = element.querySelector("input");  // missing while an image forms
  if (slider) slider.value = step;
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
element.addEventListener("click", (e) => { if (e.target.closest("button")) play(0); });
watch("value", () => {
  clearInterval(timer);
  if (!props.value || props.value.grid) return;
  if (props.value.live) return show(props.value.last);
  play(0);
});
