#!/bin/sh
# Builds the app and starts it in a simulator, on a Mac with Xcode 16 and XcodeGen.
# usage: scripts/simulate.sh ["iPhone 16"] [BUNDLE] [SCREENSHOT.png]; with the last it does not wait
# until the app ends, but for half a minute, and keeps what is seen then.
set -eu
device=${1:-iPhone 16}
bundle=${2:+$(cd "$2" && pwd)}
seen=${3:+$(cd "$(dirname "$3")" && pwd)/$(basename "$3")}
cd "$(dirname "$0")/.."
[ "$(uname)" = Darwin ] || { echo "simulate: needs a Mac with Xcode" >&2; exit 2; }
command -v xcodegen >/dev/null || { echo "simulate: needs XcodeGen: brew install xcodegen" >&2; exit 2; }
xcodegen generate --quiet
xcodebuild -quiet -project EdgeApp.xcodeproj -scheme EdgeApp -destination "platform=iOS Simulator,name=$device" \
    -derivedDataPath build CODE_SIGNING_ALLOWED=NO build
app=build/Build/Products/Debug-iphonesimulator/EdgeApp.app
id=$(/usr/libexec/PlistBuddy -c "Print CFBundleIdentifier" "$app/Info.plist")
xcrun simctl bootstatus "$device" -b
xcrun simctl install "$device" "$app"
if [ -n "$bundle" ]; then
    data=$(xcrun simctl get_app_container "$device" "$id" data)
    mkdir -p "$data/Library/Application Support/Bundles"
    cp -R "$bundle" "$data/Library/Application Support/Bundles/"
fi
if [ -z "$seen" ]; then
    exec xcrun simctl launch --console-pty "$device" "$id"
fi
xcrun simctl launch "$device" "$id"
sleep 30
xcrun simctl io "$device" screenshot "$seen"
