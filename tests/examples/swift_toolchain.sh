#!/bin/sh
# Debian 13's Swift 6.0.3, unpacked beside the system with the C library it was built against; what
# comes out is the folder with its compiler, on the last line. Once for all checkouts: the folder is
# in the user's cache. Packages come from this system's own Debian mirror, by apt's signed index.
set -eu
release=trixie
packages="swiftlang libc6-dev libgcc-14-dev libstdc++-14-dev patchelf"
# Of no use to a compiler, and two thirds of the whole.
unwanted='*lldb* */clangd */*sourcekit* */swift/embedded */swift_static */libLTO* */llvm-ar ./usr/share/doc ./usr/share/man ./usr/share/locale'
leave='gcc-14-x86-64-linux-gnu_|cpp-14|lib[a-z]+san[0-9]|debconf|perl|tzdata'

cache=${XDG_CACHE_HOME:-$HOME/.cache}/mlx-vlm-edge
root=$cache/swift-6.0.3
compiler=$root/usr/libexec/swift/bin
if [ -e "$root/.whole" ]; then
    echo "$compiler"
    exit 0
fi
fail() {
    echo "swift_toolchain: $1" >&2
    exit 1
}
[ "$(uname -sm)" = "Linux x86_64" ] || fail "only for Linux on x86_64; elsewhere use the system's own Swift"
command -v apt-get >/dev/null || fail "apt-get is needed, to fetch Debian's packages; on another system put Swift 6 on the PATH"
mirrors() {
    apt-get indextargets --format '$(ORIGIN) $(COMPONENT) $(REPO_URI)' | sed -n 's/^Debian main //p' | grep -v security | head -1
}
mirror=$(mirrors)
if [ -z "$mirror" ] && [ "$(id -u)" = 0 ]; then
    apt-get -qq update >&2
    mirror=$(mirrors)
fi
[ -n "$mirror" ] || fail "apt has no index of a Debian mirror; run apt-get update once"
key=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$key" ] || fail "$key is missing: install debian-archive-keyring"

mkdir -p "$cache"
work=$(mktemp -d "$cache/swift-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/root"
: >"$work/status"
echo "deb [signed-by=$key] $mirror $release main" >"$work/sources.list"
cat >"$work/apt.conf" <<END
Dir::State "$work"; Dir::State::status "$work/status"; Dir::Cache "$work";
Dir::Etc::sourcelist "$work/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null"; Acquire::Languages "none"; APT::Architecture "amd64";
APT::Sandbox::User "root"; Debug::NoLocking "true";
END
echo "Fetching Debian 13's Swift 6.0.3 (half a gigabyte, once)" >&2
APT_CONFIG=$work/apt.conf
export APT_CONFIG
apt-get -qq update >&2
apt-get -qq install -y --download-only --no-install-recommends $packages >&2

echo "Unpacking it in $root" >&2
set -f
exclude=
for pattern in $unwanted; do
    exclude="$exclude --exclude=$pattern"
done
set +f
for file in "$work"/archives/*.deb; do
    if ! basename "$file" | grep -qE "$leave"; then
        set -f
        dpkg-deb --fsys-tarfile "$file" | tar -x -C "$work/root" $exclude
        set +f
    fi
done
rm -rf "$root"
mv "$work/root" "$root"
for folder in lib lib64 bin sbin; do
    ln -sfn "usr/$folder" "$root/$folder"
done
# Its programs run with its own C library.
loader=$root/usr/lib64/ld-linux-x86-64.so.2
libraries=$root/usr/lib/x86_64-linux-gnu
for program in swift-frontend swift-driver clang-17 lld docc swift-plugin-server swift-package swift-format; do
    "$loader" --library-path "$libraries" "$root/usr/bin/patchelf" --set-interpreter "$loader" \
        --force-rpath --set-rpath "\$ORIGIN/../lib:\$ORIGIN/../lib/swift/linux:\$ORIGIN/../lib/swift/host:$libraries" \
        "$compiler/$program"
done
"$compiler/swiftc" --version >&2
touch "$root/.whole"
echo "$compiler"
