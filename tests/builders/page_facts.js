// What a page looks like, measured where it is shown: boxes in CSS pixels, contrast as WCAG 2 defines it.
(() => {
  const luminance = ([r, g, b]) => {
    const linear = [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const channels = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const backdrop = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = channels(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const contrast = (element) => {
    const style = getComputedStyle(element);
    const front = luminance(channels(element.closest("svg") ? style.fill : style.color));
    const back = luminance(backdrop(element));
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const around = element.closest(".scroll");
    const clip = around ? around.getBoundingClientRect() : { left: -Infinity, right: Infinity };
    const scale = element.closest("svg") ? element.getScreenCTM().a || Math.abs(element.getScreenCTM().b) : 1;
    const boxes = [...range.getClientRects()]
      .map((box) => [Math.max(box.left, clip.left), box.top + scrollY, Math.min(box.right, clip.right), box.bottom + scrollY])
      .filter((box) => box[2] - box[0] > 0.5);
    if (!boxes.length) continue;
    texts.push({
      text: node.data.trim().slice(0, 60),
      boxes,
      contrast: contrast(element),
      size: parseFloat(getComputedStyle(element).fontSize) * scale,
      figure: Boolean(element.closest("svg")),
    });
  }
  const bottom = (selector) => document.querySelector(selector)?.getBoundingClientRect().bottom ?? null;
  const cut = [...document.querySelectorAll("main *")]
    .filter((one) => !one.closest(".scroll, svg, details:not([open])") && one.getBoundingClientRect().right > innerWidth)
    .map((one) => one.tagName);
  return { texts, cut, width: document.documentElement.scrollWidth, verdict: bottom(".verdict"), why: bottom(".verdict p") };
})()
