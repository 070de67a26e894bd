#!/usr/bin/env bash
# Put a built site on the branch gh-pages: `bash .github/publish_site.sh BUILT FOLDER`, where FOLDER is latest or a tag such as
# v0.1.0. Other folders stay as they are. The branch has one commit only, because the pictures of every build would add up.
set -euo pipefail
built=$(realpath "$1") folder=$2 repository=$(git rev-parse --absolute-git-dir) site=$(mktemp -d)

if git fetch -q --depth 1 origin gh-pages; then git archive FETCH_HEAD | tar -x -C "$site"; fi
rm -rf "${site:?}/$folder"
cp -r "$built" "$site/$folder"

cd "$site"
touch .nojekyll # or Pages leaves out folders with names such as _static
tags=$(find . -maxdepth 1 -type d -name 'v*' -printf '%f\n' | sort -rV)
printf '%s\n' latest $tags | python3 -c 'import json, sys; print(json.dumps(sys.stdin.read().split()))' >versions.json
start=$(printf '%s\n' $tags latest | head -n 1)
echo "<!doctype html><title>jfbfast</title><meta http-equiv=\"refresh\" content=\"0; url=$start/\">" >index.html

export GIT_DIR=$repository GIT_WORK_TREE=$site GIT_INDEX_FILE=$site.index
git add -A -f .
commit=$(git commit-tree "$(git write-tree)" -m "The site: $folder of $(git rev-parse --short HEAD)")
git push -q -f origin "$commit:refs/heads/gh-pages"
