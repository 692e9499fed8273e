#!/bin/sh
# The Swift package alone, as a commit that SwiftPM can fetch: on the branch swift-package, with this
# folder as its root, behind the last one there. Push it to a repository of yours, and tag it there.
set -eu
cd "$(dirname "$0")"
branch=swift-package
tree=$(git rev-parse "HEAD:./")
whence=$(git rev-parse --short HEAD)
parent=$(git rev-parse -q --verify "refs/heads/$branch" || true)
if [ -n "$parent" ] && [ "$(git rev-parse "$parent^{tree}")" = "$tree" ]; then
    echo "$branch is up to date"
    exit 0
fi
commit=$(git commit-tree "$tree" ${parent:+-p "$parent"} -m "EdgeVLM of mlx-vlm-edge $whence")
git update-ref "refs/heads/$branch" "$commit"
echo "$branch is at $commit; next: git push YOUR-REPOSITORY $branch:main, then tag it there"
