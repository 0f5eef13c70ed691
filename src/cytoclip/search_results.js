// Enlarging, by a dialog of the browser's own: it holds the focus, Esc closes it, the focus goes back.
let open = null;
const live = document.createElement('div');  // read out when it changes: what is put in place of another is not
live.className = 'unseen';
live.setAttribute('role', 'status');
element.after(live);
const dialog = document.createElement('dialog');
dialog.className = 'large';
dialog.setAttribute('aria-label', 'Enlarged picture');
dialog.innerHTML = `<div class="frame"><img alt=""><div class="about"></div><div class="steps">
  <button type="button" class="back" aria-label="The one before">←</button>
  <button type="button" class="next" aria-label="The next one">→</button>
  <button type="button" class="alike">More like this</button>
  <button type="button" class="close">Close</button></div></div>`;
element.closest('.contain').append(dialog);  // where the rules for narrow screens reach

function enlarge(hit) {
  if (!hit) return;
  open = hit;
  const image = dialog.querySelector('img');
  image.src = `image/${hit.dataset.id}`;
  image.alt = hit.querySelector('.caption')?.textContent ?? hit.querySelector('.name').textContent;
  const told = hit.querySelector('.told').cloneNode(true);
  told.querySelector('.more').remove();
  dialog.querySelector('.about').replaceChildren(told);
  dialog.querySelector('.back').disabled = !hit.previousElementSibling;
  dialog.querySelector('.next').disabled = !hit.nextElementSibling;
  if (!dialog.open) dialog.showModal();
}

function more(hit) {
  if (dialog.open) dialog.close();
  element.dataset.moved = 'yes';
  trigger('more', {id: Number(hit.dataset.id)});
}

element.addEventListener('click', event => {
  const hit = event.target.closest('.hit');
  if (event.target.closest('.open')) enlarge(hit);
  if (event.target.closest('.more')) more(hit);
});
dialog.addEventListener('click', event => {
  if (event.target === dialog || event.target.closest('.close')) dialog.close();
  if (event.target.closest('.back')) enlarge(open.previousElementSibling);
  if (event.target.closest('.next')) enlarge(open.nextElementSibling);
  if (event.target.closest('.alike')) more(open);
});
dialog.addEventListener('keydown', event => {
  if (event.key === 'ArrowLeft') enlarge(open.previousElementSibling);
  if (event.key === 'ArrowRight') enlarge(open.nextElementSibling);
});
dialog.addEventListener('close', () => open?.querySelector('.open')?.focus());
watch('value', () => {
  live.textContent = element.querySelector('.said, .problem, h2')?.textContent ?? '';
  if (!element.dataset.moved) return;  // who pressed a button that is gone goes on at the top of what came
  delete element.dataset.moved;
  element.querySelector('.said')?.focus();
  element.scrollIntoView({block: 'start'});
});
