// Reports and charts as Chromium shows them: nothing is fetched, nothing overlaps or is cut off, everything can be read,
// wide and narrow, light and dark.
//     CHROMIUM=/usr/bin/chromium node check.js FILE...
'use strict';
const path = require('path');
const { pathToFileURL } = require('url');
const puppeteer = require('puppeteer-core');

const VIEWS = [400, 1280].flatMap((width) => ['light', 'dark'].map((scheme) => ({ width, scheme })));
// The contrast that WCAG 2.1 asks of text, level AA.
const CONTRAST = 4.5;

// Runs in the page. Gives what is wrong with it.
function faults(contrast) {
  const wrong = [];
  const root = document.documentElement;
  // A chart by itself has a size of its own.
  if (root.nodeName === 'HTML' && root.scrollWidth > window.innerWidth) {
    wrong.push(`the page is ${root.scrollWidth} pixels wide in a window of ${window.innerWidth}`);
  }
  for (const image of document.images) {
    if (!image.complete || image.naturalWidth === 0) wrong.push(`the picture "${image.alt}" is not shown`);
    if (!image.alt) wrong.push('a picture has no words for those who do not see it');
  }
  const channels = (colour) => (colour.match(/[\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => {
    const linear = [r, g, b].map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length && colour[3] !== 0) return colour;
    }
    const own = element.ownerSVGElement?.querySelector('.ground');
    return own ? channels(getComputedStyle(own).fill) : [255, 255, 255];
  };
  const readable = (element, colour, text) => {
    const [light, dark] = [luminance(channels(colour)), luminance(ground(element))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < contrast) wrong.push(`"${text}" has a contrast of ${ratio.toFixed(1)}`);
  };
  for (const element of document.querySelectorAll('h1, h2, h3, th, td, p, figcaption, summary, pre, span')) {
    if (element.textContent.trim()) readable(element, getComputedStyle(element).color, element.textContent.slice(0, 30));
  }
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map((text) => ({ text, box: text.getBoundingClientRect() }));
    for (const { text, box } of texts) {
      readable(text, getComputedStyle(text).fill, text.textContent.trim());
      const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1
        && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
      if (!inside) wrong.push(`"${text.textContent.trim()}" is cut off in "${svg.getAttribute('aria-label') ?? ''}"`);
    }
    // Letters may touch the line above them; words that lie on each other cannot be read.
    const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.4 * Math.min(a.height, b.height);
    texts.forEach(({ text, box }, i) => {
      for (const other of texts.slice(i + 1)) {
        if (overlap(box, other.box)) wrong.push(`"${text.textContent.trim()}" lies on "${other.text.textContent.trim()}"`);
      }
    });
  }
  return { wrong, pictures: document.images.length, charts: document.querySelectorAll('svg').length };
}

async function main() {
  const executablePath = process.env.CHROMIUM;
  const browser = await puppeteer.launch({ executablePath, args: ['--no-sandbox'] });
  let failed = 0;
  for (const file of process.argv.slice(2)) {
    for (const { width, scheme } of VIEWS) {
      const page = await browser.newPage();
      const wrong = [];
      const address = pathToFileURL(path.resolve(file)).href;
      page.on('request', (request) => {
        const url = request.url();
        if (url !== address && !url.startsWith('data:')) wrong.push(`it asks for ${url}`);
      });
      page.on('console', (message) => wrong.push(`the console says ${message.text()}`));
      page.on('pageerror', (error) => wrong.push(`${error}`));
      await page.setViewport({ width, height: 900 });
      await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
      await page.goto(address, { waitUntil: 'load' });
      const found = await page.evaluate(faults, CONTRAST);
      wrong.push(...found.wrong);
      if (found.pictures + found.charts === 0) wrong.push('nothing is drawn');
      if (process.env.SHOTS) {
        const name = `${path.basename(path.dirname(file))}.${path.basename(file)}.${width}.${scheme}.png`;
        await page.screenshot({ path: path.join(process.env.SHOTS, name), fullPage: true });
      }
      await page.close();
      for (const fault of [...new Set(wrong)]) console.error(`${file}, ${width} pixels, ${scheme}: ${fault}`);
      failed += wrong.length;
    }
  }
  await browser.close();
  console.log(`browser: ${process.argv.length - 2} files in ${VIEWS.length} views, ${failed} faults`);
  process.exit(failed === 0 ? 0 : 1);
}

main();
