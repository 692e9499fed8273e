#!/bin/sh
# Builds the app and starts it in a simulator, on a Mac with Xcode 16 and XcodeGen.
# usage: scripts/simulate.sh ["iPhone 16"] [BUNDLE]
set -eu
cd "$(dirname "$0")/.."
device=${1:-iPhone 16}
bundle=${2:-}
[ "$(uname)" = Darwin ] || { echo "simulate: needs a Mac with Xcode" >&2; exit 2; }
command -v xcodegen >/dev/null || { echo "simulate: needs XcodeGen: brew install xcodegen" >&2; exit 2; }
xcodegen generate --quiet
xcodebuild -quiet -project EdgeApp.xcodeproj -scheme EdgeApp -destination "platform=iOS Simulator,name=$device" \
    -derivedDataPath build CODE_SIGNING_ALLOWED=NO build
app=build/Build/Products/Debug-iphonesimulator/EdgeApp.app
id=$(/usr/libexec/PlistBuddy -c "Print CFBundleIdentifier" "$app/Info.plist")
xcrun simctl boot "$device" 2>/dev/null || true
xcrun simctl install "$device" "$app"
if [ -n "$bundle" ]; then
    data=$(xcrun simctl get_app_container "$device" "$id" data)
    mkdir -p "$data/Library/Application Support/Bundles"
    cp -R "$bundle" "$data/Library/Application Support/Bundles/"
fi
xcrun simctl launch --console-pty "$device" "$id"
