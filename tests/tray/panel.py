"""A panel and a notification service that a test can ask, on a bus of their own.

Run as a program: it reads one JSON command a line and answers with one line.  It needs `gi` and
nothing of the tests, for only the system's Python may have it.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import gi

gi.require_version("Gdk", "3.0")
gi.require_version("Gtk", "3.0")
from gi.repository import Gdk, Gio, GLib, Gtk  # noqa: E402 - after the version is chosen

WATCHER = """<node><interface name="org.kde.StatusNotifierWatcher">
<method name="RegisterStatusNotifierItem"><arg type="s" direction="in"/></method>
<method name="RegisterStatusNotifierHost"><arg type="s" direction="in"/></method>
<property name="RegisteredStatusNotifierItems" type="as" access="read"/>
<property name="IsStatusNotifierHostRegistered" type="b" access="read"/>
<property name="ProtocolVersion" type="i" access="read"/>
<signal name="StatusNotifierItemRegistered"><arg type="s"/></signal>
</interface></node>"""
NOTIFIER = """<node><interface name="org.freedesktop.Notifications">
<method name="Notify"><arg type="s" direction="in"/><arg type="u" direction="in"/>
<arg type="s" direction="in"/><arg type="s" direction="in"/><arg type="s" direction="in"/>
<arg type="as" direction="in"/><arg type="a{sv}" direction="in"/><arg type="i" direction="in"/>
<arg type="u" direction="out"/></method>
<method name="CloseNotification"><arg type="u" direction="in"/></method>
</interface></node>"""
ITEM = "org.kde.StatusNotifierItem"
MENU = "com.canonical.dbusmenu"


class Panel:
    def __init__(self) -> None:
        self.items: list[tuple[str, str]] = []  # bus name and path of each icon
        self.notes: list[list[str]] = []
        self.bus = Gio.bus_get_sync(Gio.BusType.SESSION)

    def own(self, name: str, path: str, xml: str) -> None:
        node = Gio.DBusNodeInfo.new_for_xml(xml).interfaces[0]
        self.bus.register_object(path, node, self.called, self.asked, None)
        Gio.bus_own_name_on_connection(self.bus, name, 0, None, None)

    def called(self, *call: Any) -> None:
        _, sender, _, _, method, arguments, invocation = call
        given = arguments.unpack()
        answer = None
        if method == "RegisterStatusNotifierItem":
            at_path = given[0].startswith("/")
            item = (sender, given[0]) if at_path else (given[0], "/StatusNotifierItem")
            if item not in self.items:  # libayatana-appindicator says it more than once
                self.items.append(item)
        elif method == "Notify":
            self.notes.append([given[3], given[4]])
            answer = GLib.Variant("(u)", (len(self.notes),))
        invocation.return_value(answer)

    def asked(self, *question: Any) -> Any:
        name = question[4]
        if name == "RegisteredStatusNotifierItems":
            return GLib.Variant("as", [sender + path for sender, path in self.items])
        return GLib.Variant("b", True) if name.startswith("Is") else GLib.Variant("i", 0)

    def call(self, path: str, interface: str, method: str, arguments: Any) -> Any:
        """A method of the newest icon's program."""
        target = self.items[-1][0]
        return self.bus.call_sync(
            target, path, interface, method, arguments, None, 0, 3000, None
        ).unpack()

    def item(self) -> Any:
        """The properties of the newest icon."""
        if not self.items:
            return None
        everything = GLib.Variant("(s)", (ITEM,))
        path = self.items[-1][1]
        return self.call(path, "org.freedesktop.DBus.Properties", "GetAll", everything)[0]

    def lines(self) -> list[dict[str, Any]]:
        """The menu, each line with its number."""
        question = GLib.Variant("(iias)", (0, -1, []))
        _, (_, _, children) = self.call(self.item()["Menu"], MENU, "GetLayout", question)
        return [{"id": number, **facts} for number, facts, _ in children]

    def click(self, label: str) -> bool:
        """Numbers change with every click: look it up, and say whether that went well."""
        for line in self.lines():
            if line.get("label") == label and line.get("enabled", True):
                event = (line["id"], "clicked", GLib.Variant("i", 0), 0)
                self.call(self.item()["Menu"], MENU, "Event", GLib.Variant("(isvu)", event))
                return True
        return False

    def watch(self) -> None:
        """The panel comes up."""
        self.own("org.kde.StatusNotifierWatcher", "/StatusNotifierWatcher", WATCHER)

    def command_of(self, entry: str) -> list[str]:
        """What a desktop would run for this file."""
        line = Gio.DesktopAppInfo.new_from_filename(entry).get_commandline()
        return [word.replace("%%", "%") for word in GLib.shell_parse_argv(line)[1]]

    def clipboard(self) -> Any:
        """Only the main loop may ask for it."""
        found: list[Any] = []
        here = threading.Event()

        def take() -> None:
            Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD).request_text(keep)

        def keep(_clipboard: Any, text: Any, *_more: Any) -> None:
            found.append(text)
            here.set()

        GLib.idle_add(take)
        here.wait(3)
        return found[0] if found else None


def main(wanted: list[str]) -> None:
    panel = Panel()
    if "watcher" in wanted:
        panel.watch()
    if "notifier" in wanted:
        path = "/org/freedesktop/Notifications"
        panel.own("org.freedesktop.Notifications", path, NOTIFIER)
    loop = GLib.MainLoop()
    threading.Thread(target=loop.run, daemon=True).start()
    print("ready", flush=True)  # noqa: T201 - a program
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            known = getattr(panel, command)
            answer = known(*arguments) if callable(known) else known
        except (GLib.Error, KeyError) as error:  # the program is busy, ending or gone
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)  # noqa: T201
    loop.quit()


if __name__ == "__main__":
    main(sys.argv[1:])
