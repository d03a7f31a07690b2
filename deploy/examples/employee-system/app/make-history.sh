#!/bin/sh
# Builds the application's git repository at DEST: one commit and one annotated tag per release.
#
# base/ is the first release; a directory named after a later release holds the files that it adds or replaces.
# Author, dates and modes are fixed, so every run anywhere gives the same hashes.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
[ $# -eq 1 ] || { echo "usage: $0 DEST" >&2; exit 2; }
dest=$1
if [ -e "$dest" ] && { [ ! -d "$dest" ] || [ -n "$(ls -A "$dest")" ]; }; then
    echo "$0: $dest exists and is not an empty directory" >&2
    exit 1
fi

# Nothing of the machine's or the user's git configuration may reach the commits, and no variable of a git that
# calls this script may point it at another repository.
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_COMMON_DIR
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
export GIT_AUTHOR_NAME="Employee System" GIT_AUTHOR_EMAIL="team@example.com"
export GIT_COMMITTER_NAME="$GIT_AUTHOR_NAME" GIT_COMMITTER_EMAIL="$GIT_AUTHOR_EMAIL"

mkdir -p "$dest"
# No template: it would bring hooks along.
git -C "$dest" init --quiet --initial-branch=main --object-format=sha1 --template=
git -C "$dest" config core.autocrlf false

release() { # tag, directory with its files, date
    cp -R "$here/$2/." "$dest/"
    # No file of the application is executable; a copy's modes depend on where it came through.
    find "$dest" -path "$dest/.git" -prune -o -type f -exec chmod 644 {} +
    git -C "$dest" add --all
    GIT_AUTHOR_DATE=$3 GIT_COMMITTER_DATE=$3 git -C "$dest" commit --quiet --message "Release $1"
    GIT_COMMITTER_DATE=$3 git -C "$dest" tag --annotate "$1" --message "Production release $1"
}

release v0.9.5 base "2024-03-05T10:00:00+0000"
release v1.0.0 v1.0.0 "2024-05-14T10:00:00+0000"
release v1.1.0 v1.1.0 "2024-07-09T10:00:00+0000"

git -C "$dest" for-each-ref --format='%(refname:short) %(*objectname)' refs/tags
