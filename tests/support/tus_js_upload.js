// Uploads a file with tus-js-client, with an interruption after the first chunk.
// Arguments: folder of node_modules, endpoint, path, name, protocol of tus-js-client.
const fs = require('fs');
const [, , modules, endpoint, path, name, protocol] = process.argv;
const tus = require(`${modules}/tus-js-client`);
const size = fs.statSync(path).size;
const chunkSize = Math.ceil(size / 3);

function upload(uploadUrl, interrupt) {
  return new Promise((resolve, reject) => {
    const one = new tus.Upload(fs.createReadStream(path), {
      endpoint, uploadUrl, protocol, chunkSize, uploadSize: size,
      metadata: { filename: name },
      headers: { 'Content-Disposition': `inline; filename="${name}"` },
      onError: reject,
      onSuccess: () => resolve(one.url),
      onChunkComplete: () => interrupt && one.abort().then(() => resolve(one.url)),
    });
    one.start();
  });
}

upload(undefined, true)
  .then((url) => upload(url, false))
  .catch((error) => { console.error(error.message); process.exit(1); });
