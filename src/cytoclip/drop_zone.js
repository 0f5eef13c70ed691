// A picture goes to the server as it is, which answers with a ticket for it: the value of this component.
const zone = element.querySelector('.zone'), input = zone.querySelector('input');
let latest = 0;  // of two pictures the one that was given last is meant, whichever arrives first
const invite = zone.querySelector('.invite'), held = zone.querySelector('.held'), wrong = zone.querySelector('.wrong');

function show(name, told) {
  invite.hidden = Boolean(told);
  input.hidden = Boolean(told);
  held.hidden = !told;
  held.querySelector('img').src = told ? told.preview : '';
  held.querySelector('p').textContent = told ? `${name} · ${told.width}×${told.height}` : '';
}

function set(value) {
  props.value = value;
  trigger('change');
}

async function take(file) {
  if (!file) return;
  wrong.textContent = '';
  if (file.size > props.limit) {
    wrong.textContent = `${file.name} has ${file.size.toLocaleString()} bytes, and ${props.limit.toLocaleString()} are allowed.`;
    return;
  }
  const turn = ++latest;
  zone.classList.add('busy');
  try {
    const headers = {'content-type': 'application/octet-stream'};
    const answer = await fetch('picture', {method: 'POST', body: file, headers});
    const told = await answer.json();
    if (turn !== latest) return;
    if (!answer.ok) {
      wrong.textContent = `${file.name}: ${told.error}. ${told.hint}`;
      return;
    }
    show(file.name, told);
    set({ticket: told.ticket});
    held.querySelector('button').focus();
  } catch {
    if (turn === latest) wrong.textContent = 'The server does not answer.';
  } finally {
    if (turn === latest) zone.classList.remove('busy');
    input.value = '';  // the same file may be chosen again
  }
}

input.addEventListener('change', () => take(input.files[0]));
zone.addEventListener('dragover', event => { event.preventDefault(); zone.classList.add('over'); });
zone.addEventListener('dragleave', () => zone.classList.remove('over'));
zone.addEventListener('drop', event => {
  event.preventDefault();
  zone.classList.remove('over');
  take(event.dataTransfer.files[0]);
});
document.addEventListener('paste', event => {
  const file = [...(event.clipboardData?.files ?? [])].find(one => one.type.startsWith('image/'));
  if (file && zone.checkVisibility()) { event.preventDefault(); take(file); }
});
held.querySelector('button').addEventListener('click', () => { latest++; show(); set(null); input.focus(); });
