// Below a path of a proxy, what optuna-dashboard addresses from "/" on is asked for below that path.
"use strict";
(() => {
  const root = document.currentScript.dataset.root;
  const placed = (url) => (typeof url === "string" && /^\/(api|artifacts|csv|static)\//.test(url) ? root + url : url);
  const { fetch } = window;
  window.fetch = (url, ...rest) => fetch(placed(url), ...rest);
  const { open } = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.open = function (method, url, ...rest) {
    return open.call(this, method, placed(url), ...rest);
  };
  const { setAttribute } = Element.prototype;
  Element.prototype.setAttribute = function (name, value) {
    return setAttribute.call(this, name, name === "src" || name === "href" ? placed(value) : value);
  };
  const source = Object.getOwnPropertyDescriptor(HTMLImageElement.prototype, "src");
  Object.defineProperty(HTMLImageElement.prototype, "src", {
    ...source,
    set(value) {
      source.set.call(this, placed(value));
    },
  });
})();
