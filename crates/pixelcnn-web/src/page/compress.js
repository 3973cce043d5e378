// Compress: files into an archive, and an archive's files.

import { ask, base64, bytes, cell, chooser, element, expectFew, head, models, size, waiting, work } from './common.js';

const section = document.getElementById('compress');
const progress = section.querySelector('progress');
const results = section.querySelector('.results');
const { run, reset } = work(section);

function start() {
  section.querySelector('.stop').addEventListener('click', () => (progress.hidden = true));
  chooser(section.querySelector('.drop'), (files) => {
    const archive = files.length === 1 && files[0].name.endsWith('.pxc');
    run(async (signal, say) => {
      expectFew(files);
      results.replaceChildren();
      progress.hidden = false;
      progress.value = 0;
      try {
        await (archive ? decompress(files[0], signal, say) : compress(files, signal, say));
      } finally {
        // What took its place shows its own.
        if (!signal.aborted) progress.hidden = true;
      }
    });
  });
}

function told(say, what) {
  return (name, data) => {
    if (name === 'progress') progress.value = data.share;
    say(waiting(name, data) ?? what);
  };
}

/** A link to keep a file by. */
function link(name, data, kind = 'application/octet-stream') {
  const url = URL.createObjectURL(new Blob([data], { type: kind }));
  return element('a', { href: url, download: name.split('/').pop() }, name);
}

async function compress(files, signal, say) {
  const request = { model: models.chosen.name, compare: true, files: [] };
  for (const file of files) request.files.push({ name: file.webkitRelativePath || file.name, data: await base64(file) });
  const done = await ask('v1/compress', request, told(say, 'compressing…'), signal);
  const rows = done.files.map((file) => element('tr', {},
    cell(file.name), cell(size(file.original_bytes), true), cell(size(file.bytes), true),
    cell(file.png_bytes === undefined ? '' : size(file.png_bytes), true),
    cell(file.jpeg_xl_bytes === undefined ? '' : size(file.jpeg_xl_bytes), true),
    cell(file.coded ? 'coded by the model' : 'kept as it is')));
  const table = element('table', {}, head('File', '#as it came', '#in the archive', '#as PNG', '#as JPEG XL', ''), element('tbody', {}, ...rows));
  const name = files.length === 1 ? `${files[0].name.replace(/\.[^.]*$/, '')}.pxc` : 'archive.pxc';
  results.replaceChildren(element('p', {}, link(name, bytes(done.archive)), ` has ${size(done.bytes)}, ${(100 * done.bytes / Math.max(done.original_bytes, 1)).toFixed(1)} % of ${size(done.original_bytes)}`), table);
  say('Done: the archive is below.');
}

async function decompress(file, signal, say) {
  const done = await ask('v1/decompress', { archive: await base64(file), model: models.chosen.name }, told(say, 'decompressing…'), signal);
  const rows = done.files.map((taken) => {
    if (taken.lost) return element('tr', {}, cell(taken.name), cell(''), cell(taken.lost));
    const data = bytes(taken.data);
    const name = taken.made && !taken.name.endsWith('.png') ? `${taken.name}.png` : taken.name;
    const known = taken.made ? 'image/png' : { png: 'image/png', jpg: 'image/jpeg', jpeg: 'image/jpeg', gif: 'image/gif', webp: 'image/webp' }[name.split('.').pop().toLowerCase()];
    const shown = known ? element('img', { src: URL.createObjectURL(new Blob([data], { type: known })), alt: name }) : '';
    return element('tr', {}, cell(link(name, data, known)), cell(shown), cell(size(data.length), true));
  });
  results.replaceChildren(element('table', {}, head('File', '', '#size'), element('tbody', {}, ...rows)));
  const lost = done.files.filter((taken) => taken.lost).length;
  say(`${done.files.length - lost} of ${done.files.length} taken out`, lost > 0);
}

function chosen() {
  reset();
  progress.hidden = true;
  results.replaceChildren();
}

export { chosen, start };
