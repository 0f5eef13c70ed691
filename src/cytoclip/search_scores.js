// What came is read out: see search_results.js.
const live = document.createElement('div');
live.className = 'unseen';
live.setAttribute('role', 'status');
element.after(live);
watch('value', () => {
  const first = element.querySelector('tbody tr');
  live.textContent = first ? `Most likely: ${first.innerText}` : element.querySelector('.problem')?.textContent ?? '';
});
