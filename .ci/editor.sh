#!/bin/sh
# Installs a YAML language server and runs it on the recipes against the committed schema.
set -eu
cd "$(dirname "$0")/../tests/editor"
npm ci --no-progress --loglevel=error
node client.js
