"""The families of sound events by class; the last family of each class is for the test set only."""

from __future__ import annotations

from . import events_nature as nature
from . import events_objects as objects
from .synth import Family

# class -> families; the last is held out for the test
FAMILIES: dict[str, tuple[Family, ...]] = {
    "alarm": (
        objects.siren_wail,
        objects.siren_yelp,
        objects.smoke_alarm,
        objects.buzzer,
        objects.alarm_clock,
        objects.horn,
        objects.siren_two_tone,
    ),
    "animal": (
        nature.bird,
        nature.dog,
        nature.cat,
        nature.cow,
        nature.cricket,
        nature.bee,
        nature.frog,
        nature.owl,
    ),
    "applause": (objects.applause_big, objects.applause_swelling, objects.applause_small),
    "bell": (
        objects.church_bell,
        objects.hand_bell,
        objects.door_bell,
        objects.wind_chime,
        objects.ding,
        objects.ship_bell,
    ),
    "clock": (objects.clock_wall, objects.clock_watch, objects.clock_tall),
    "engine": (
        objects.car,
        objects.motorcycle,
        objects.propeller,
        objects.machine,
        objects.aeroplane,
        objects.jet,
        objects.diesel,
    ),
    "fire": (nature.fire_small, nature.fire_big, nature.furnace, nature.fire_sparks),
    "footsteps": (objects.steps_hard, objects.steps_wood, objects.steps_gravel, objects.steps_snow),
    "glass": (objects.glass_break, objects.glass_clink, objects.glass_bottles),
    "knocking": (objects.knock_door, objects.knock_table, objects.knock_hollow),
    "metal": (objects.hammer, objects.metal_clang, objects.metal_rattle),
    "noise": (nature.hiss, nature.static, nature.hum, nature.pink),
    "rain": (nature.rain_steady, nature.rain_roof, nature.rain_heavy, nature.rain_light),
    "telephone": (
        objects.keypad,
        objects.dial_tone,
        objects.line_busy,
        objects.ringing_old,
        objects.ringing_electronic,
        objects.ringback,
    ),
    "thunder": (nature.thunder_roll, nature.thunder_crack, nature.explosion),
    "water": (nature.stream, nature.drip, nature.waves, nature.flush, nature.pouring),
    "wind": (nature.wind_plain, nature.wind_howl, nature.wind_gusts),
}
